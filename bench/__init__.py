"""Benchmarks: what a poll, a start, a change and a worker cost, here and with the alternatives.

    python -m bench                      everything: a table, and JSON and plots in bench/results/
    python -m bench --quick              the same with fewer runs and workers, to see that it works
    python -m bench --only poll,memory   some of the questions
    python -m bench --contestants shmflags,sdk       some of the alternatives
    python -m bench --json               the measurements on stdout
    python -m bench --markdown           the README's table on stdout
    python -m bench --markdown --from bench/results/results.json     … without measuring again
    python -m bench worker_startup       the start of your own workers; see its --help

It needs the extra `bench`, and `redis-server` on the path, which it starts itself on a free port.

Who is who
----------
A question is a module of this package, named in `frame.QUESTIONS`:

    TITLE: str                                       heads its part of the table
    def steps(options: Options) -> list[Step]        what is to be done, for the progress bar
    def rows(results: Results) -> list[Row]          its lines of the table
    def plots(results: Results) -> list[Plot]        its plots; may be left out

`steps` measures nothing; each `Step` has a label and a function that returns `Measurement`s: case,
contestant, unit and samples. The frame runs the steps in order, keeps what they returned, and gives all
of it, as `Results`, to `rows` and `plots`; these must cope with what is missing, so that they can be
run from an older file, or after `--only`. What stands in a measurement goes to the JSON file as it is.

A contestant is a module of `bench.contestants` with a `make(place, poll_interval_s)` that returns a
PostHog `FlagDefinitionCacheProvider`; `place` says where its files or its server are.

Nothing is measured in the process that draws the progress bar. `processes.Process` is a fresh
interpreter in which named functions are called; `rounds.in_turn` takes samples of all contestants in
turn; the API's stand-in, `DefinitionsServer`, runs in this process, which otherwise sleeps.
`redis_server.RedisServer` is a Redis of our own.
"""
