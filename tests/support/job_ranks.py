"""One rank of a job that torchrun starts, which may be killed in the middle:

torchrun --nproc-per-node 2 tests/support/job_ranks.py [kill RANK RESULTS] generate ...
"""

from __future__ import annotations

import os
import signal
import sys

from broken_jobs import watched

from dlm_fast import cli
from dlm_fast.jobs import job


def main(argv: list[str]) -> int:
    killed, results = -1, 0
    if argv[0] == "kill":
        killed, results, argv = int(argv[1]), int(argv[2]), argv[3:]
    job.GATHERED = 2  # so that a short job has results on the disk

    def die(count: int) -> None:
        if int(os.environ["RANK"]) == killed and count == results:
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(index: int) -> None:
        sys.stderr.write(f"rank {os.environ['RANK']} decodes line {index}\n")

    with watched(on_result=die, on_row=tell):
        return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
