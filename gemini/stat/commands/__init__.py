"""One module a command: ``HELP``, ``add_arguments(parser)`` and ``run(options) -> Exit``. Imported when called."""

MODULES = {
    "show": "gemini.stat.commands.show",
    "top": "gemini.stat.commands.top",
    "ls": "gemini.stat.commands.ls",
    "dmon": "gemini.stat.commands.dmon",
    "chunks": "gemini.stat.commands.chunks",
    "timeline": "gemini.stat.commands.timeline",
    "lease": "gemini.stat.commands.lease",
    "wait": "gemini.stat.commands.wait",
    "check": "gemini.stat.commands.check",
    "verify": "gemini.stat.commands.verify",
    "doctor": "gemini.stat.commands.doctor",
    "schema": "gemini.stat.commands.schema",
    "export": "gemini.stat.commands.export",
    "serve": "gemini.stat.commands.serve",
    "report": "gemini.stat.commands.report",
    "estimate": "gemini.estimate.command",
    "explain-oom": "gemini.estimate.explain",
    "bench": "gemini.estimate.bench",
}
"""By name, not imported: those that need torch lie in higher layers, and none is loaded before it is asked for."""

SUMMARY = """\
  top         the live screen (what plain gemini-stat shows on a terminal)
  ls          all runs: status, step, age
  dmon        a row every few seconds, for logs and pipes
  chunks      the chunks: homes, sizes, parameters
  timeline    one step by moment: model and non-model data
  serve       the run as a web page on this machine, with an API and /metrics
  report      the run as one HTML file
  export      for Prometheus, as records, as a table, as a trace
  estimate    what a model will need, before anything is allocated
  explain-oom what there was when memory ran out, and what would have helped
  bench       measure this machine, for estimate and the live screen
  lease       who holds what of this machine's memory; ask a run to change
  wait        block until a run is finished, steady, or at a step
  check       thresholds for CI
  verify      are the files of a checkpoint as they were written?
  doctor      what this machine and this installation can do
  schema      the JSON Schema of --json, or of the records
"""
