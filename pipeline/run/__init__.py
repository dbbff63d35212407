"""The run directory and its life, whatever is computed in it. Knows no stage.

In: a place (a local path or a URI), the settings, and a display. Out: files that are complete under their final name or
absent, and run.json, which says what each stage was told, what it depends on and how far it is.
Start with run.py, the `Run` that every stage is given; then storage.py and manifest.py. The rest serves one purpose each:
lock, fingerprint, remote (data and models behind URIs), attempts, progress, run_log, tracker, redaction, failure.
"""
