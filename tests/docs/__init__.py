"""The documentation, executed: what its pages promise is tried on real servers.

Conventions of the fenced blocks, all visible in the pages' source:

- ``sql``: statements on one connection per page, in order. Behind a statement ``-- returns: a | b``
  once per row (null is ``null``, booleans are ``t`` and ``f``), ``-- returns no rows``, or
  ``-- error: SQLSTATE beginning of the message``.
- ``console``: each ``$ command`` must succeed; lines below it are its output. A document behind
  ``<<'EOF'`` belongs to its command.
- ``yaml``: an overlay is composed, alerting rules must name metrics that exist.
- ``…`` stands for any text, alone on a line for any lines.

An HTML comment directly above a block changes how it is executed: ``eventually`` (again and again
until it is as it says), ``in the background`` (until the end of the page), ``figures vary`` (any
number is as good), ``not executed: reason``. Above a table, ``troubles of PIPELINE``: see
`tests.docs.trouble`. Which servers stand behind the addresses is said in `tests.docs.conftest`, how
a backend's section is added in `tests.docs.test_patterns`.
"""
