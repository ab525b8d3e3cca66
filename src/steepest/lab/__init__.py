"""Commands that compare and study optimizers: the race, the suite, the bench, the plan, the spike study, and listings.

The race has these parts, each with a file of its own:

* a `workload <steepest.lab.workloads.workload>` is a model with data, a loss and a validation;
* a `contender <steepest.lab.shared.contenders>` is an optimizer with all its settings and their provenance;
* a `trial <steepest.lab.race.trial>` is one run of a contender on a workload, which leaves a record;
* a `race <steepest.lab.race.race>` decides which trials are run, a pool runs each in a process, a store keeps records;
* `results <steepest.lab.race.results>` are what the records say in numbers, which console and report show.

The `suite <steepest.lab.suite.suite>` runs trials of many contenders on many workloads; its
`protocol <steepest.lab.suite.protocol>` decides which, as pure functions of the results so far.
"""

from steepest.lab.workloads.workload import Workload

__all__ = ["Workload"]
