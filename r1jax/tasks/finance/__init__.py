"""The finance task: the risk that a transaction is fraud, from the streams of its customer and terminal, and text."""
