"""report: one self-contained HTML page about a run.

In: what the stages left (prepared/, values/, masks/, run.json) and the tokenizer, for the texts of tokens. Out:
report/index.html, the same bytes for the same run.
Start with stage.py, which fills report.html.jinja; heat_map.py and histogram.py make its pictures.
"""
