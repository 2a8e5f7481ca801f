"""The processes of a run: launchers, ZeRO engines, collectives, stop signals, hangs."""
