"""The comparisons that take too long to run live in a chapter: a script for each chapter.

A notebook may import them (`from experiments.chapter_09 import flops`), never the other way round.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # the scripts import `common` as a neighbour
