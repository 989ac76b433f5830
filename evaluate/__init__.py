"""What a simulator is for, measured: language modelling, classification, and what each
approximation costs.

`language.py`, `classification.py` and `ablation.py` are the three experiments; they share the
learners that they compare (`learners.py`), the store that lets an interrupted run go on
(`store.py`), the choice of learning rates (`choice.py`) and the statistics (`statistics.py`).
"""
