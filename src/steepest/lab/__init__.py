"""The race: contenders train the same model on the same data, with equal tuning, and everything that happened is shown.

Five nouns, each in a file of its own:

* a `workload` is something to train: a model, batches, a loss, a validation;
* a `contender <contenders>` is an optimizer with all its settings, and how they were found;
* a `trial` is one contender's run on a workload, for some steps, with one seed, and the `Record` it leaves;
* a `race` decides which trials are run, a `crew` runs each in a process of its own, a `store` keeps their records;
* `findings` are what the records say, in numbers and words; the console and the report only show them.
"""

from steepest.lab.workloads.workload import Workload

__all__ = ["Workload"]
