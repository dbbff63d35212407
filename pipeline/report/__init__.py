"""report: one self-contained HTML page about a run, and rows of it in a terminal.

In: what the stages left (prepared/, values/, masks/, run.json) and the tokenizer, for the texts of tokens. Out:
report/index.html, the same bytes for the same run.

Start with stage.py. reading.py goes over the run once, beside each other what was prepared, its scores and what each mask
(shown_masks.py) keeps. On the way tally.py counts and choice.py chooses the rows that are shown; content.py holds one of
them, payload.py makes JSON of everything, page.py puts it into html/. terminal.py shows rows that find.py has found.
"""
