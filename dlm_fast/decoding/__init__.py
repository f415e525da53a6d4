"""The decode loop's inside: the plan of a batch, the window of a step, and the step itself."""
