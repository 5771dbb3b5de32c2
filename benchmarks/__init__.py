"""The benchmark harness: training runs, their table, speed. See ``benchmarks/README.md``."""

import os

# Before torch and MuJoCo are imported: one thread per process, and nothing is drawn.
# Inductor compiles in the process itself, so that its CPU-seconds are counted.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "disable")
