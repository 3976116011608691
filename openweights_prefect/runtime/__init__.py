"""Inside a run: the current run, its event spool, its child process. Standard library only."""
