"""What a folder of weights says of its network, its classes and the pictures it wants."""
