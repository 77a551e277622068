"""How a run is proved equal to another: its real command started, killed, resumed and compared."""
