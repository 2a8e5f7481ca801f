"""Puts this folder on sys.path (pytest does, because the file is here), so that all tests share its helper modules."""

import signal

# A shell starts its background jobs with SIGINT ignored, which every program of the tests would inherit: Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
