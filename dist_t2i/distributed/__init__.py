"""Processes of a run: launching, ZeRO engines, collectives, stopping, hangs."""
