"""Schedules: one file per operator family, each turning (TIR, config) into scheduled TIR."""
