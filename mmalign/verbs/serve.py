"""Serve scorers over HTTP to the scorer `remote` of other processes and machines, until interrupted."""

from __future__ import annotations

import argparse

from mmalign.screen import Screen
from mmalign.verbs import COMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    what = parser.add_argument_group("what")
    what.add_argument("--scorers", required=True, metavar="NAME[,NAME]", help="as `mmalign ls scorers` lists them")
    what.add_argument("--set", action="append", default=[], metavar="SCORER.OPTION=VALUE", help="an option of a scorer")
    how = parser.add_argument_group("how (beyond this machine only with a token, read from MMALIGN_TOKEN)")
    how.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s, this machine)")
    how.add_argument("--port", type=int, default=8190, metavar="N", help="0 takes a free one (default: %(default)s)")
    how.add_argument("--batch-size", type=int, default=16, metavar="N", help="items a scorer gets at once (default: %(default)s)")
    how.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one request (default: %(default)s)")
    how.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda:0 or auto (default: %(default)s)")

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import jobs, serve

        recipes = jobs.scorer_recipes(options)
        settings = serve.Settings(options.host, options.port, batch_size=options.batch_size, timeout=options.timeout)

        def ready(server: serve.Server) -> None:
            screen.say(f"serving {', '.join(recipes)} at {server.url} (Ctrl-C ends it)")

        try:
            serve.serve(recipes, settings, jobs.devices(options.device)[0], ready)
        except KeyboardInterrupt:
            screen.say("ended")
        screen.give({"served": list(recipes)})
        return COMPLETE

    return run
