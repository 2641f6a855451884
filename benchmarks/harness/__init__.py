"""What all benchmarks share: a runner, a store of results, a table writer, and the models and images that they measure.

Each benchmark is one file beside this folder that lists tasks, measures one, and says what its table shows. A task is
a dictionary of plain values: all that determines its result. Finished tasks are kept, so a rerun does only the rest.
"""

from harness.runner import answer, carry_out
from harness.store import Result, Store, Task
from harness.tables import figure, markdown_table, spread, write_report

__all__ = ["Result", "Store", "Task", "answer", "carry_out", "figure", "markdown_table", "spread", "write_report"]
