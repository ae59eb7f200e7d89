"""The benchmarks: one module per row, the floors and the servers beside them.

Every count is taken at the destination. Figures of a shared machine drift, so a throughput comes
with the floor that the same run measured, and a cost with the same load without it, in turns.
"""
