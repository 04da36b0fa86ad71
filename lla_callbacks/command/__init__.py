"""The command line: for who has a checkpoint, or the logs of a run, and no Trainer."""
