// A box above each long table: only rows that contain what is typed are shown.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table")) {
    const rows = table.querySelectorAll("tbody tr");
    if (rows.length < 20) continue;
    const box = document.createElement("input");
    box.type = "search";
    box.placeholder = `Filter ${rows.length} rows`;
    box.addEventListener("input", () => {
      const wanted = box.value.toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
    table.before(box);
  }
});
