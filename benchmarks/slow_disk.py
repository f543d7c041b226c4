"""A slow disk: a library that, loaded before others, lets each write into a folder `checkpoints` take longer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from distrain.errors import ConfigError

RATE = "DISTRAIN_BENCH_BYTES_PER_SECOND"
"""Variable with the speed of the disk."""

_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

ssize_t write(int file, const void *data, size_t length) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    ssize_t written = real(file, data, length);
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    const char *rate = getenv("DISTRAIN_BENCH_BYTES_PER_SECOND");
    if (written > 0 && size > 0 && rate) {
        path[size] = 0;
        if (strstr(path, "/checkpoints/")) {
            double seconds = written / atof(rate);
            struct timespec pause = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
            nanosleep(&pause, NULL);
        }
    }
    return written;
}
"""


def build(folder: Path) -> Path:
    """Compile the library into a folder; return its path, for LD_PRELOAD.

    Raises:
        ConfigError: there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ConfigError(
            "the part saves compiles a library that slows the disk down: install gcc, or measure other parts"
        )
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "slow_disk.c", folder / "slow_disk.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library
