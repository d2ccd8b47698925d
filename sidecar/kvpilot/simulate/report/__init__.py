"""One comparison as a page: charts from values to SVG text, and the HTML around them."""
