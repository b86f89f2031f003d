"""The op benchmarks, for the user's own machine: ``tailor-fast bench``.

Every backend that can run is first held against the reference on the same inputs, then all are
timed in interleaved rounds; beside each time stands the floor that the machine's own memory and
matrix unit set, measured in the same run.
"""

from tailor_fast.bench.measure import Ceilings, measure_ceilings
from tailor_fast.bench.runner import Row, run_bench

__all__ = ["Ceilings", "Row", "measure_ceilings", "run_bench"]
