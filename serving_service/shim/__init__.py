"""The shim: one small process that owns one replica and outlives the Serving process that started it.

It uses the standard library only and is written with plain threads: it must start in a few hundredths of a second and
stay small, because there is one beside every model.
"""
