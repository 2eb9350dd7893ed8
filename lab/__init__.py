"""What only some people need: studies of many runs, and pages to look at them."""
