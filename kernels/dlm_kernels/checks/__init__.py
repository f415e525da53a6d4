"""What the arguments of a call must satisfy: one check an op, run by its reference and by its launcher alike. Imports
torch only, but for `contents`, which the debug mode loads."""
