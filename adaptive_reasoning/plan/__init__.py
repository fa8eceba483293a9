"""The plan of a run: memory of each GPU and hours, from the model's config, the options and named assumptions.

shapes.py   the sizes of a model, and a table of the papers' models, so that no network is needed
machine.py  GPUs with their nominal figures, and how many of them there are
memory.py   what each phase of a run holds; the peak is that of the largest phase; which option mends what does not fit
hours.py    time of a step and of a run: decode roofline, prefill, update, exchange, evaluation, checkpoints
command.py  `--preflight`: prints both and ends without loading a weight
scaling.py  the tables of docs/scaling.md
"""
