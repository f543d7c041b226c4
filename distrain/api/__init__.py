"""The functions of `import distrain`. They are imported when they are first used, because torch takes seconds."""
