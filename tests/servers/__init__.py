"""Real servers, started for real: `running.py` starts them and asks their workers.

`recipes/` holds the files that the README shows; the other modules are the applications that run in
the servers, with `answers.py` as what they say.
"""
