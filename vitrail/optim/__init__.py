"""How weights move: parameter groups, optimizers, schedules, averages."""
