"""Parsl on this machine: two workers, as a trial of the cluster path.

equitune label frames.xyz -o out.xyz --with gfn2-xtb --executor parsl:recipes/clusters/local.py
"""

from parsl import Config, HighThroughputExecutor
from parsl.providers import LocalProvider

config = Config(
    executors=[
        HighThroughputExecutor(
            label="local",
            address="127.0.0.1",
            max_workers_per_node=2,
            provider=LocalProvider(worker_init="export OMP_NUM_THREADS=1", init_blocks=1, max_blocks=1),
        )
    ],
    retries=2,  # of a task whose worker was lost
    strategy="none",
)
