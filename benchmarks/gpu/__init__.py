"""The run on a GPU that ``benchmarks/gpu.sh`` starts.

``run`` starts the stages, each in processes of its own and with a deadline. A stage is a module
that works through items by ``work``: ``machine``, ``checks``, ``kernels``, ``host`` and ``steps``.
The tests run under pytest, with the plugin ``pytest_records``. ``small`` is what runs under
compute-sanitizer and ncu. ``report`` turns the files of a run into ``README.md`` and ``pictures``.
"""
