"""The parts that the three models share; they take primitives and know no config."""
