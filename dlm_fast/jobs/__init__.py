"""Jobs: from a file of prompts to a file of results.

`lines` reads and checks the input, `partial` is the file that a job writes until it is complete, and `job` decodes.
"""

from .job import result_line, run
from .lines import Line, lines_of, read_lines
from .partial import JobError, check_places

__all__ = ["JobError", "Line", "check_places", "lines_of", "read_lines", "result_line", "run"]
