"""When do Batch Normalization and Dropout help? Answered by measurement: ``bnext study``.

An experiment is a file in ``bnext/study/experiments/`` with one `EXPERIMENT`; there is nothing else
to register. It has four functions:

``arms(scale) -> {label: settings}``
    The variants. Settings are JSON values and complete: with the data and the seed they decide
    every bit of a run, so that a run with the same settings is never repeated. ``scale.sizes()``
    says how many samples; ``scale.pick(quick, full)`` and ``scale.epochs`` how much work. A run
    should take a fraction of a second if quick.
``run(settings, dataset, seed) -> metrics``
    One run: a pure function that returns numbers, or lists of numbers for curves. Accuracies are
    in percent. ``training.split`` draws the data of a seed, ``networks`` has models,
    ``training.initialize`` gives all arms of a seed the same weights, ``training.fit`` trains,
    ``training.measure`` evaluates.
``contrasts(results) -> [Contrast, ...]``
    What is compared, which claims of `bnext.study.claims` that decides and how, and the sentences
    of the first page. Few, since each makes the others' tests stricter. Where accuracies are
    compared, ``results.best(norm="batch")`` chooses the learning rate on validation data.
``plot(figure, results)``
    With ``plots.lines`` and ``plots.bars``.

``learning_rate.py`` is an example. What stands outside of ``arms``, ``contrasts``, ``plot`` and
``EXPERIMENT`` counts as code of the runs: changing it makes finished runs worthless, changing those
does not.
"""
