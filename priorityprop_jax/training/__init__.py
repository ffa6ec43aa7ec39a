"""RUN: the trainer, the command line, and the real tasks that they train on."""
