"""Modules over the operators: the GDN mixer, attention, and the block that holds either."""
