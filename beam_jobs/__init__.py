"""The stages of a month as Beam jobs, and the command that runs them."""
