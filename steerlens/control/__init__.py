"""The plant, the regulator, and where the state should be: what A-LQR and its relatives are made of."""
