"""What `launch/commands/doctor.py` looks at: one file per concern. Findings are plain data, so that they
travel between ranks as JSON.
"""
