"""Where each box of each logical tensor lies: the mesh, how axes are cut, the join of two layouts, what a mesh costs.

Opens no file.
"""
