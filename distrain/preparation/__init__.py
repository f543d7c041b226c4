"""Making data sets: blocks of images from a source, or an index of tar files."""
