"""The static site of a simulator: its graph at every stage, its slots, what it costs, and the
exported model that runs in the browser.

site.py      write_site: all files, whole or not at all
graphs.py    data/graph-STAGE.json      slots.py    data/slots.json
operators.py data/operators.json        costs.py    data/cost.json, with lower_bound.py
running.py   data/run.json, model/, tokenizer/
static.py    the page itself, built from web/ into static/
serving.py   a file server on loopback
model_explorer.py                       the same graph for Model Explorer

The data is plain JSON; the page shows all of it as text.
"""
