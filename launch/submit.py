"""Submit a SLURM job that runs a copy of the code: ``python launch/submit.py JOB.sbatch --config FILE``."""

import sys

from megatron_gkd.cli.submit import main

if __name__ == "__main__":
    sys.exit(main())
