"""Looking inside: what a model is made of and costs, what it attends to, and how its training went."""
