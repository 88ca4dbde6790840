"""Tables, contact sheets and the README's figures from results."""
