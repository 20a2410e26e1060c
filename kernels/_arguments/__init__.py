"""The arguments of a backend's operations: a named tuple for each struct of csrc/arguments, in the
file of its name, with its fields in its order.

A struct that another holds is a tuple within the tuple; one that another derives from is its first
field, and has the name of the struct.
"""
