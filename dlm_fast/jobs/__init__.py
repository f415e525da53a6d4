"""Jobs: from a file of prompts to a file of results.

`lines` reads and checks the input, `rows` makes rows of its lines, `partial` is the file that a job writes until it is
complete, `ranks` are the processes that share a job, and `job` decodes.
"""

from .job import result_line, run
from .lines import Line, Lines, lines_of, read_lines
from .partial import JobError, check_places
from .ranks import Ranks

__all__ = ["JobError", "Line", "Lines", "Ranks", "check_places", "lines_of", "read_lines", "result_line", "run"]
