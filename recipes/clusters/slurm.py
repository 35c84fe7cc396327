"""Parsl on a Slurm cluster: up to 8 nodes of 128 cores, a worker per core. Adapt partition, account and modules.

equitune label frames.xyz -o out.xyz --with pyscf:pbe0/def2-svp --workers 1024 \
    --executor parsl:recipes/clusters/slurm.py

--workers says how many tasks are kept in flight; start it on the login node inside tmux or as a small job.
A lost node costs its frames under way, which are tried again; a stopped command goes on where it was.
"""

from parsl import Config, HighThroughputExecutor
from parsl.launchers import SrunLauncher
from parsl.providers import SlurmProvider

config = Config(
    executors=[
        HighThroughputExecutor(
            label="slurm",
            max_workers_per_node=128,
            provider=SlurmProvider(
                partition="standard",
                account="my-account",
                nodes_per_block=1,
                init_blocks=1,
                max_blocks=8,
                walltime="04:00:00",
                exclusive=True,
                launcher=SrunLauncher(),
                # the environment that equitune is installed in, one thread a worker
                worker_init="module load python; source ~/equitune/bin/activate; export OMP_NUM_THREADS=1",
            ),
        )
    ],
    retries=2,
)
